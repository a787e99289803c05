"""What is done with a batch: the jitted functions of the policy and of the critic, and the order of it all."""
