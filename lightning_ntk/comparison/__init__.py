"""A run beside its linearized network: told of batches and steps, asked for scalars."""
