"""What the training stages build on: trainers, batches, the reward, rollouts, and what watches over them."""
