"""From a recipe to a trained adapter: the plan, the loop, checkpoints and the run's folder."""
