"""`python -m llm_kd` lists the commands; `llm-kd COMMAND ...` runs one."""

from kd_common.run.commands import dispatch


def main() -> None:
    """Run or list the commands of this package."""
    dispatch("llm_kd")


if __name__ == "__main__":
    main()
