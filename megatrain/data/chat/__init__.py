"""Conversations to tune on: their forms, the chat template that lays them out, and which tokens count in the loss."""
