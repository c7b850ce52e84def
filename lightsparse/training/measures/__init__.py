"""What a step and a validation are measured by: sums of losses, right answers, what the attention reports of itself."""
