"""What keeps a run alive, and no mathematics. It imports nothing of ours from outside this folder."""
