"""cxai-predict --workdir=RUN --images PATH... --out=DIR

The same as python -m cxai_jax.predict. With --model=DIR it takes a bundle, which
cxai-export --bundle wrote, instead of a workdir.

Writes predictions.csv, patients.csv where patients are known, overlays/*.jpg and
report.html to DIR. Exit code 0: everything was predicted; 1: some files were not, the
page says why; 2: nothing was; 128 + n: stopped by signal n, --resume continues.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cxai_jax import progress, signals
from cxai_jax.inference.choices import CAM, CONTINUES, MAPS, OVERLAYS, POINTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see the module."""
    parser = make_parser()
    given = parser.parse_intermixed_args(arguments)
    done = given.out / "predictions.csv"
    if done.exists() and not given.resume:
        parser.error(
            f"{done} exists; add --resume to continue, or choose another --out"
        )
    print("loading JAX", flush=True)
    from cxai_jax.inference import predicting

    return predicting.run(given, parser.error)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    about_this = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser("cxai-predict", epilog=about_this)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", type=Path, help="a finished run")
    model.add_argument("--model", help="a bundle: its folder, or a hub id OWNER/NAME")
    parser.add_argument("--images", nargs="+", action="extend", default=[])
    parser.add_argument("more", nargs="*", help="more files, folders or globs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--votes", type=int, help="masks per image; default: config")
    parser.add_argument("--window", type=window, help="CENTER,WIDTH for DICOM files")
    parser.add_argument("--site", default="", help="NAME of the images' site, or each")
    parser.add_argument("--map", default=CAM, help=f"one of {', '.join(MAPS)}")
    parser.add_argument(
        "--overlays",
        default=OVERLAYS[0],
        choices=OVERLAYS,
        help="which images are drawn with their map, on the page as well",
    )
    parser.add_argument(
        "--operating_point",
        default="",
        help=f"one of {', '.join(POINTS)}, or a threshold such as 0.5",
    )
    parser.add_argument(
        "--keep_ids", action="store_true", help="patient ids as they are, not hashed"
    )
    parser.add_argument("--resume", action="store_true", help="continue in --out")
    return parser


def window(text: str) -> tuple[float, float]:
    """Centre and width of a text like "-600,1500"."""
    centre, width = map(float, text.split(","))
    if not width > 0:  # NaN too.
        raise ValueError("the width must be positive")
    return centre, width


def command() -> int:
    """`main`, where a full disk or a signal outside the loop ends in one line."""
    signals.begin("before anything was predicted", CONTINUES)
    # Its threads would wait for work by counting, on the cores that XLA needs.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logging.basicConfig(handlers=[progress.Log()])
    try:
        return main()
    except OSError as error:
        from cxai_jax import disk

        if not (told := disk.explain(error, "--resume continues")):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name} at once; {CONTINUES}")
        return 128 + number


if __name__ == "__main__":
    sys.exit(command())
