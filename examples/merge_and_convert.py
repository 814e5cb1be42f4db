"""After training: a dense checkpoint, or an adapter for the full-precision model.

    python examples/merge_and_convert.py MODEL initial trained

MODEL is the full-precision checkpoint; `initial` and `trained` are the adapter's folders before and after training.
Do not merge the trained adapter into the full-precision weights with PEFT: it also contains the correction of the
quantization error, which those weights do not have.
"""

import argparse

import quailora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("initial")
    parser.add_argument("trained")
    parser.add_argument("--dense", default="dense", help="folder for the dense checkpoint")
    parser.add_argument("--converted", default="converted", help="folder for the converted adapter")
    arguments = parser.parse_args()

    # Q + scaling * B A as ordinary weights, for any server.
    quailora.merge(arguments.model, arguments.trained, arguments.dense, initial=arguments.initial)

    # What training learned (trained minus initial), as an adapter of up to twice the rank for the full-precision model.
    quailora.convert(arguments.initial, arguments.trained, arguments.converted)


if __name__ == "__main__":
    main()
