"""cxai-train --config=siteB:full,lite0 --workdir=runs/b

The same: python -m cxai_jax.main --config=configs/siteB.py:full,lite0 --workdir=runs/b

What takes time to import waits in train.py, and JAX until the command line is known to
be right: from the first moment on Ctrl-C ends in one line.
"""

import sys

from cxai_jax import signals

HELP = {"--help", "--helpfull", "--helpshort"}


def cli() -> None:
    """The command: `cxai-train`, or python -m cxai_jax.main."""
    signals.begin("before the run began")
    from absl import app, flags

    from cxai_jax import train

    flags.adopt_module_key_flags(train)  # --help shows those of this file.
    arguments = sys.argv[1:]
    if not HELP & set(arguments):
        try:
            arguments = train.checked(arguments)
        except train.EXPLAINED as error:
            sys.exit(f"error: {error}")
        print("loading JAX", flush=True)
    app.run(train.main, argv=[sys.argv[0], *arguments])


if __name__ == "__main__":
    cli()
