"""What the package ships to try it with: a small model, its task (`task`), prompts to train on and to be judged by."""
