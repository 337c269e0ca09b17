"""`python -m tllm.server` and `tllm.server`: the predecessor's server command.

This file does not know its options.
"""


def main() -> None:
    from tllm.cli.legacy import server_main

    server_main()


if __name__ == "__main__":
    main()
