"""What chooses the blocks or tokens that a query reads: scores, top-k, distillation, kept mass."""
