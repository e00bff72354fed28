"""What leaves a run: the merged model, verified, and the model card."""
