"""Train the paper's set-ups, score them all by one protocol, and print the table of docs/results.md.

    python tools/results.py                            train what is missing, score val, print
    python tools/results.py --rows base flip --jobs 2  two of the rows, side by side
    python tools/results.py --test                     score test as well, once all is chosen
    python tools/results.py --encoder FILE             the rows that start from trained weights, too

Each row is a run of train.py, in a folder of its own. The same command goes on with what was
stopped. What train.py and evaluate.py wrote about a finished run is gathered in
results.json, and the table is made of that file alone: no figure is typed. A run that
stands there is not trained again. The file behind docs/results.md is docs/results.json; copy
it to runs/results/ to train only what it lacks.
"""

import contextlib
import datetime
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))
import data
import evaluate
import utils

FCN = "--model fcn --init xavier_uniform --epochs 150"
PAPER = "--augment flip --cosine --class-weights --epochs 150"
TRANSFER = "--cosine --class-weights --epochs 150"
TUNED = "--model resnet34_darrennet --augment --cosine --epochs 150"
# The row's name; the set-up; what the paper has on test, mIoU and accuracy; train.py's flags.
ROWS = (
    ("base", "FCN, the baseline", "0.06, 75 %", FCN),
    ("flip", "+ augmentation", "0.06, 72 %", f"{FCN} --augment flip"),
    ("cosine", "+ cosine annealing", "0.05, 74 %", f"{FCN} --augment flip --cosine"),
    ("weights", "+ class weights", "0.04, 67 %", f"{FCN} --augment flip --cosine --class-weights"),
    ("darrennet", "DarrenNet", "0.05, 75 %", f"--model darrennet {PAPER}"),
    ("unet", "UNet", "0.05, 55 %", f"--model unet {PAPER}"),
    ("main", "DarrenNet, our defaults", "", "--model darrennet --augment --cosine"),
    ("mild", "+ mild class weights", "",
     "--model darrennet --augment --cosine --class-weights mild"),
    ("transfer", "DarrenNet on ResNet34", "0.10, 78 %", f"--model resnet34_darrennet {TRANSFER}"),
    ("transfer-flip", "+ augmentation", "", f"--model resnet34_darrennet --augment flip {TRANSFER}"),
    ("transfer-affine", "affine instead", "0.15, 82 %",
     f"--model resnet34_darrennet --augment affine {TRANSFER}"),
    ("transfer-unet", "UNet on ResNet34", "0.08, 79 %", f"--model resnet34_unet {TRANSFER}"),
    ("transfer-fcn", "FCN on ResNet34", "", f"--model resnet34_fcn {TRANSFER}"),
    ("transfer-tuned", "DarrenNet on ResNet34, no class weights", "", TUNED),
    ("transfer-tenth", "encoder at a tenth of the rate", "", f"{TUNED} --encoder-lr 0.1"),
    ("transfer-frozen", "encoder frozen", "", f"{TUNED} --encoder-lr 0"),
)  # fmt: skip
SEEDS = {"main": (0, 1, 2), "mild": (0, 1, 2)}  # of other rows 0 alone
# How a split is scored: the column's name, evaluate.py's flags, the end of its folder's name.
PROTOCOLS = (("paper's", ["--void-as-background"], "-paper"), ("own", [], ""))
# Of a run's scores; more than the tables show, since its folder may not last.
KEPT = ("mean_iou", "pixel_accuracy", "mean_accuracy", "mean_dice")


def parse_args(argv=None):
    """Return the settings."""
    parser = utils.make_parser(__doc__)
    add, names = parser.add_argument, [row[0] for row in ROWS]
    add("--data", default="voc2007", help="as for train.py; default: %(default)s")
    add("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    how = "folder of the runs, one for each data set; default: %(default)s"
    add("--out", type=Path, default=Path("runs/results"), help=how)
    add("--jobs", type=utils.number(int, 1), default=1, help="how many to train at a time")
    add("--encoder", metavar="FILE", help="trained weights for the rows that are called transfer")
    add("--compile", action="store_true", help="handed to train.py")
    add("--test", action="store_true", help="score the test split, too")
    return parser.parse_args(argv)


def script(name, *args, log, threads):
    """Run a script of the repository, and append what it prints to a file."""
    command = [sys.executable, SCRIPTS / name, *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        status = subprocess.call(command, stdout=file, stderr=file, env=environment)
    if status:
        raise utils.UserError(f"{name} ended with status {status}: see the end of {log}")


def finish_run(folder, flags, place, splits, threads):
    """Train a run to its end where that is not done yet, score it, and return its record.

    flags: those that make the result; place: those that say where data lie, and how fast.
    """
    log, origin = folder.with_suffix(".txt"), folder.with_suffix(".json")
    if not (origin.exists() and (folder / "last.pt").exists()):  # written as training begins
        today = datetime.date.today().isoformat()
        write_json(origin, {"flags": " ".join(flags), "commit": commit(), "date": today})
    if not (folder / "samples.png").exists():  # the last thing that train.py writes
        arguments = (*flags, *place, "--out", folder, "--resume")
        script("train.py", *arguments, log=log, threads=threads)
    scores = {}
    for split in splits:
        for protocol, scored_by, ending in PROTOCOLS:
            path = folder / "scores" / (split + ending) / "metrics.json"
            if not path.exists():
                arguments = (folder, "--split", split, *scored_by)
                script("evaluate.py", *arguments, log=log, threads=threads)
            metrics = read_json(path)
            scores[f"{split}, {protocol}"] = {name: metrics[name] for name in KEPT}

    history = evaluate.read_log(folder / "log.csv")
    settings = read_json(folder / "settings.json")
    return read_json(origin) | {
        "scores": scores,
        "best_epoch": int(utils.best_row(history)["epoch"]),
        "epochs": int(history[-1]["epoch"]),
        "minutes": round(sum(row["seconds"] for row in history) / 60, 1),
        "torch": settings["versions"]["torch"],
        "device": settings["device"].rpartition(", ")[0],  # without the system's name
    }


def commit():
    """Return the commit of the scripts, or none where git does not know it."""
    command = ["git", "-C", SCRIPTS, "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return "none"


def write_json(path, content):
    """Write an object to a file, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    utils.replace(temporary, path)


def read_json(path):
    """Return the content of a JSON file, or an empty dictionary where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def cell(records, column):
    """Return a cell of the table: the mean of the runs' scores, and of several the range of mIoU."""
    scores = [record["scores"].get(column) for record in records]
    if not scores or None in scores:
        return "not run"
    ious = [each["mean_iou"] for each in scores]
    accuracy = sum(each["pixel_accuracy"] for each in scores) / len(scores)
    spread = f" ({min(ious):.4f} to {max(ious):.4f})" if len(ious) > 1 else ""
    return f"{sum(ious) / len(ious):.4f}{spread}, {accuracy:.1%}"


def print_tables(results):
    """Print the table of the rows, and one of the machines that trained them, in Markdown."""
    columns = [f"{split}, {protocol}" for split in ("val", "test") for protocol, *_ in PROTOCOLS]
    heads = ["set-up", "flags", "paper, test", *columns]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, what, paper, flags in ROWS:
        records = [results[run] for run in runs_of(name) if run in results]
        if len(records) > 1:
            what += f", mean of {len(records)} seeds"
        cells = [cell(records, column) for column in columns]
        print(f"| {' | '.join([what, f'`{flags}`', paper or 'none', *cells])} |")

    heads = ["run", "best epoch", "minutes", "commit", "date", "PyTorch", "device"]
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for run in [run for name, *_ in ROWS for run in runs_of(name) if run in results]:
        record = results[run]
        best = f"{record['best_epoch']} of {record['epochs']}"
        rest = [str(record[key]) for key in ("minutes", "commit", "date", "torch", "device")]
        print(f"| {' | '.join([run, best, *rest])} |")


def runs_of(name):
    """Return the names of a row's runs, one for each seed."""
    return [f"{name}-{seed}" if seed else name for seed in SEEDS.get(name, (0,))]


def missing(args, splits):
    """Return {run: (flags, place, the encoder's record)} of what results.json lacks."""
    path = args.out / "results.json"
    results, wanted = read_json(path), {}
    # torchvision's files have these digits in their names.
    weights = args.encoder and hashlib.sha256(Path(args.encoder).read_bytes()).hexdigest()[:8]
    for name, _, _, flags in ROWS:
        transfer = name.startswith("transfer")
        if name not in args.rows or (transfer and not args.encoder):
            continue
        place = ["--data", args.data, *(["--compile"] if args.compile else [])]
        place += ["--encoder-weights", args.encoder] if transfer else []
        encoder = {"encoder": weights} if transfer else {}
        for run, seed in zip(runs_of(name), SEEDS.get(name, (0,))):
            words = [*flags.split(), "--seed", str(seed)]
            kept = results.get(run, {"flags": " ".join(words), "scores": {}})
            for what, now in ({"flags": " ".join(words)} | encoder).items():
                if kept.get(what, now) != now:
                    said = f"{run} was trained with {what} {kept[what]}; give another --out"
                    raise utils.UserError(f"{path}: {said}")
            if all(f"{split}, own" in kept["scores"] for split in splits):
                continue
            if kept["scores"] and not (args.out / run / "best.pt").exists():
                print(f"{run}: was trained elsewhere, not scored here", file=sys.stderr)
            else:
                wanted[run] = words, place, encoder
    return wanted


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    splits = ("val", "test") if args.test else ("val",)
    if not args.encoder and all(name.startswith("transfer") for name in args.rows):
        raise utils.UserError("rows that are called transfer need --encoder FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    path, wanted = args.out / "results.json", missing(args, splits)

    if wanted:  # get and decode the images before several runs try it at once
        for split in splits:
            data.load_dataset(args.data, split, size=32, progress=utils.progress)
    threads = max(1, torch.get_num_threads() // args.jobs)
    pool = ThreadPoolExecutor(args.jobs)

    def stop_after_error(job):  # no other row is begun
        if not job.cancelled() and job.exception():
            pool.shutdown(wait=False, cancel_futures=True)

    jobs = {}
    for run, (flags, place, _) in wanted.items():
        job = pool.submit(finish_run, args.out / run, flags, place, splits, threads)
        job.add_done_callback(stop_after_error)
        jobs[job] = run
    try:
        for job in as_completed(jobs):
            run = jobs[job]
            _, _, encoder = wanted[run]
            record = job.result() | encoder
            # Read anew: another call may have written to it.
            write_json(path, read_json(path) | {run: record})
            print(f"{run}: done", file=sys.stderr, flush=True)
    finally:  # after Ctrl-C, too
        pool.shutdown(cancel_futures=True)
    print_tables(read_json(path))


if __name__ == "__main__":
    utils.cli(main, data.DataError)
