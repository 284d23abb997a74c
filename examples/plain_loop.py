"""The smallest plain loop with GEKO: a toy classifier, each epoch drawn from the samples that are not yet learnt."""

import torch

import geko_kernels as gk

torch.manual_seed(0)
inputs = torch.randn(2000, 16)
labels = (inputs[:, :4] @ torch.randn(4, 5)).argmax(1)  # 5 classes
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

state = gk.SampleState(len(inputs), gk.GEKOConfig.balanced())  # one row a sample
for epoch in range(10):
    chosen = state.bucket != gk.Bucket.FREEZE  # no sample is frozen before its first visit
    if epoch % 3 == 0:
        chosen[:] = True  # look again at the frozen ones: one that has been forgotten thaws
    ids_of_epoch = chosen.nonzero().squeeze(1)
    for ids in ids_of_epoch[torch.randperm(len(ids_of_epoch))].split(50):
        loss = gk.weighted_loss(model(inputs[ids]), labels[ids], ids, state)  # in place of F.cross_entropy
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = {bucket.name: count for bucket, count in zip(gk.Bucket, state.bucket_counts().tolist(), strict=True)}
    print(f"epoch {epoch + 1}: trained on {len(ids_of_epoch)} samples, now {counts}")

accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"accuracy on the training set: {accuracy:.3f}")
