"""What vLLM's workers load to take over weights and prove which ones they hold."""
