"""``python -m eptq_onnx``, and the command ``eptq-onnx``."""

from eptq_onnx.interrupts import command


def main() -> None:
    """Run the command line."""
    with command():
        # Within, for it takes a second, and a signal may come then.
        from eptq_onnx.cli import app  # noqa: PLC0415

        app(prog_name="eptq-onnx")


if __name__ == "__main__":
    main()
