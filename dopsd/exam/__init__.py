"""The teacher's exam: how much closer to the pictures the teacher draws than the base model, before the first step."""
