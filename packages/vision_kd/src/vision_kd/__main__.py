"""`python -m vision_kd` lists the commands; `vision-kd COMMAND ...` runs one."""

from kd_common.run.commands import dispatch


def main() -> None:
    """Run or list the commands of this package."""
    dispatch("vision_kd")


if __name__ == "__main__":
    main()
