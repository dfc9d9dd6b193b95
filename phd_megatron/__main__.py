"""``python -m phd_megatron``, also the program that torchrun starts."""

from phd_megatron.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
