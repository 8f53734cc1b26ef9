"""`python -m spec_decode` lists the commands; `spec-decode COMMAND ...` runs one."""

from kd_common.run.commands import dispatch


def main() -> None:
    """Run or list the commands of this package."""
    dispatch("spec_decode")


if __name__ == "__main__":
    main()
