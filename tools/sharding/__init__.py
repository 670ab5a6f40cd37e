"""Images -> shards: plan, write, resume, on one machine or many."""
