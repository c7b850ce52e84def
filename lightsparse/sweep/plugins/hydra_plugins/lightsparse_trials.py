"""Where Hydra finds the launcher: it builds plugins by names below the namespace package hydra_plugins only."""

from lightsparse.sweep.launcher import TrialLauncher as TrialLauncher
