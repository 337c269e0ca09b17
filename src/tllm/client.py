"""`python -m tllm.client` and `tllm.client`: the predecessor's client command.

This file does not know its options.
"""


def main() -> None:
    from tllm.cli.legacy import client_main

    client_main()


if __name__ == "__main__":
    main()
