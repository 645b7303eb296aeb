"""Trainers on top of rollout: PPO, its data, rewards, metrics and configuration."""
