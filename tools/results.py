"""Train the paper's set-ups, score them all by one protocol, and print the table of docs/results.md.

    python tools/results.py                            train what is missing, score val, print
    python tools/results.py --rows base flip --jobs 2  two of the rows, side by side
    python tools/results.py --test                     score test as well, once all is chosen
    python tools/results.py --encoder FILE             the rows that start from trained weights, too

Each row is a run of train.py, in a folder of its own. What was ended is gone on with by the
same command, and what is finished is only read: so all figures in the table come from files
that train.py and evaluate.py wrote.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))
import data
import utils

FCN = "--model fcn --init xavier_uniform --epochs 150"
PAPER = "--augment flip --cosine --class-weights --epochs 150"
TRANSFER = "--cosine --class-weights --epochs 150"
# The row's name; the set-up; what the paper has on test, mIoU and accuracy; train.py's flags.
ROWS = (
    ("base", "FCN, the baseline", "0.06, 75 %", FCN),
    ("flip", "+ augmentation", "0.06, 72 %", f"{FCN} --augment flip"),
    ("cosine", "+ cosine annealing", "0.05, 74 %", f"{FCN} --augment flip --cosine"),
    ("weights", "+ class weights", "0.04, 67 %", f"{FCN} --augment flip --cosine --class-weights"),
    ("darrennet", "DarrenNet", "0.05, 75 %", f"--model darrennet {PAPER}"),
    ("unet", "UNet", "0.05, 55 %", f"--model unet {PAPER}"),
    ("main", "DarrenNet, our defaults, three seeds", "", "--model darrennet --augment --cosine"),
    ("transfer", "DarrenNet on ResNet34", "0.10, 78 %", f"--model resnet34_darrennet {TRANSFER}"),
    ("transfer-flip", "+ augmentation", "", f"--model resnet34_darrennet --augment flip {TRANSFER}"),
    ("transfer-affine", "affine instead", "0.15, 82 %",
     f"--model resnet34_darrennet --augment affine {TRANSFER}"),
    ("transfer-unet", "UNet on ResNet34", "0.08, 79 %", f"--model resnet34_unet {TRANSFER}"),
    ("transfer-fcn", "FCN on ResNet34", "", f"--model resnet34_fcn {TRANSFER}"),
)  # fmt: skip
SEEDS = {"main": (0, 1, 2)}  # of other rows 0 alone
# The table's columns: a split, and the flags by which it is scored.
PROTOCOLS = {"paper's": ["--void-as-background"], "own": []}


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


def finish_run(folder, flags, args):
    """Train a run to its end, and score it, where that is not done yet."""
    log, threads = folder.with_suffix(".txt"), max(1, torch.get_num_threads() // args.jobs)
    if not is_finished(folder):
        script("train.py", *flags, "--out", folder, "--resume", log=log, threads=threads)
    for split in ("val", "test") if args.test else ("val",):
        for protocol, scored_by in PROTOCOLS.items():
            if not scores_path(folder, split, protocol).exists():
                arguments = (folder, "--split", split, *scored_by)
                script("evaluate.py", *arguments, log=log, threads=threads)


def is_finished(folder):
    """Return whether a run came to its end: samples.png is what it draws last."""
    return (folder / "samples.png").exists()


def scores_path(folder, split, protocol):
    """Return where evaluate.py writes the scores of a run."""
    name = f"{split}-paper" if protocol == "paper's" else split
    return folder / "scores" / name / "metrics.json"


def cell(folders, split, protocol):
    """Return a cell of the table: the mean of the runs' scores, and of several the range of mIoU."""
    paths = [scores_path(folder, split, protocol) for folder in folders]
    if not all(path.exists() for path in paths):
        return "not run"
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    ious = [each["mean_iou"] for each in scores]
    accuracy = sum(each["pixel_accuracy"] for each in scores) / len(scores)
    spread = f" ({min(ious):.4f} to {max(ious):.4f})" if len(ious) > 1 else ""
    return f"{sum(ious) / len(ious):.4f}{spread}, {accuracy:.1%}"


def minutes(folders):
    """Return how long the runs took, validation included, as a cell of the table."""
    logs = [folder / "log.csv" for folder in folders if is_finished(folder)]
    if not logs:
        return "-"
    rows = [row for log in logs for row in csv.DictReader(log.read_text().splitlines())]
    return f"{sum(float(row['seconds']) for row in rows) / 60 / len(logs):.0f}"


def main(argv=None):
    """Run the command line; see the top of the file."""
    args = parse_args(argv)
    shared = ["--data", args.data, *(["--compile"] if args.compile else [])]
    runs, wanted = {}, []
    for name, _, _, flags in ROWS:
        seeds = SEEDS.get(name, (0,))
        runs[name] = [args.out / (f"{name}-{seed}" if seed else name) for seed in seeds]
        extra = ["--encoder-weights", args.encoder] if name.startswith("transfer") else []
        if name in args.rows and (args.encoder or not extra):
            for folder, seed in zip(runs[name], seeds):
                wanted.append((folder, [*flags.split(), "--seed", seed, *shared, *extra]))
    if not wanted:
        raise utils.UserError("rows that are called transfer need --encoder FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("val", "test") if args.test else ("val",):  # before several try it at once
        data.load_dataset(args.data, split, size=32, progress=utils.progress)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        jobs = [pool.submit(finish_run, *each, args) for each in wanted]
        for (folder, _), job in zip(wanted, jobs):
            job.result()
            print(f"{folder}: done", file=sys.stderr, flush=True)
    finally:  # after an error, or Ctrl-C, no other row is begun
        pool.shutdown(cancel_futures=True)

    columns = [(split, protocol) for split in ("val", "test") for protocol in PROTOCOLS]
    heads = ["set-up", "flags", "paper, test", *(", ".join(c) for c in columns), "minutes"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, what, paper, flags in ROWS:
        cells = [cell(runs[name], *column) for column in columns]
        line = [what, f"`{flags}`", paper or "none", *cells, minutes(runs[name])]
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    utils.cli(main, data.DataError)
