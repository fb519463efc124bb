"""What a training run needs beside its loop: settings, state, saving, resuming, log."""
