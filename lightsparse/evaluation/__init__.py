"""What a trained model makes of its context: loss by position and by distance, retrieval by length and depth.

`subject` is the model that is asked, ours or any causal one of transformers; `positions`, `distance` and `retrieval`
measure; `report` writes JSON, CSV and PNG; `tasks` makes the tasks of conf/data/ fit a model; `callback` does it every
n steps of a training.
"""
