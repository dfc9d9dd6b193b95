"""``python -m phd_megatron``, also the program that torchrun starts."""

from phd_megatron.runtime.launcher import die_with_launcher

die_with_launcher()  # before the imports, which take seconds

from phd_megatron.cli.main import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
