import torch

torch.set_num_threads(1)  # the models are tiny: on a busy machine, waiting for a second thread takes longer than the work
