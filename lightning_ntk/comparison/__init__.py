"""A run beside its linearised network: told of batches and steps, asked for scalars."""
