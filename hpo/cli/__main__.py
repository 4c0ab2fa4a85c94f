"""`python -m hpo.cli`, the same as `hpo`."""

from hpo.cli.app import main

if __name__ == "__main__":
    main()
