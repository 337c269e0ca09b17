"""`python -m tllm` is the `tllm` command."""

from tllm.cli import main

if __name__ == "__main__":
    main()
