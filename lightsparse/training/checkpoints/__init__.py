"""What survives the end of a process: checkpoints, the run directory and its lock, and reading a run back.

A checkpoint, file or folder, holds exactly this (tests/training/checkpoints/test_checkpoints_content.py):

key                          written by                what it is
state_dict                   Lightning                 weights and buffers of the LanguageModel
optimizer_states             Lightning                 momenta and their kin, one entry: there is one optimizer
lr_schedulers                Lightning                 the step of the schedule
global_step                  Lightning                 optimizer steps behind all of it
epoch                        Lightning                 0: a run has one epoch
loops                        Lightning                 its counters; callback.py sets those of batches for other ranks
callbacks                    Lightning                 state of StepCheckpoint, Recorder and the user's callbacks
pytorch-lightning_version    Lightning
DataModule                   data.module               samples consumed, fingerprint and what else fixes the order
health                       training.module           steps skipped, the last losses
validation                   training.module           sums of the last validation, by position
validated                    training.module           optimizer steps behind it
scores                       training.module           its right answers; None where the data asks nothing
choices                      training.module           blocks chosen in it, of each rank; only where the input decides
residuals                    training.module           what a gradient hook owes, of each rank; only with such a hook
random                       checkpoints.callback      the generators, of each rank
config                       checkpoints.callback      the composed config
code                         checkpoints.callback      versions of lightsparse and torch
"""
