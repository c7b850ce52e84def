"""Train a long-context model with sparse attention. Everything is chosen on the command line, from conf/:

python train.py                                          # the default run: minutes on two cores
python train.py experiment=smoke                         # seconds: does everything work here?
python train.py attention=dense data.context=8192        # any key of conf/ by override
python train.py -m attention.density=0.05,0.1,0.2        # a sweep
python train.py --help                                   # all groups and keys
"""

from lightsparse.cli.train import main

if __name__ == "__main__":
    main()
