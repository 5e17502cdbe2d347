"""Reinforcement learning from verifiable answers: rewards, rollouts, and the stream of batches made of them."""
