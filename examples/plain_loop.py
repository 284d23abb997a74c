"""A loop of one's own with GEKO: a toy classifier, each epoch drawn from the samples that are not yet learnt."""

import torch

import geko_kernels as gk

torch.manual_seed(0)
inputs = torch.randn(2000, 16)
labels = (inputs[:, :4] @ torch.randn(4, 5)).argmax(1)  # 5 classes
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

dataset = torch.utils.data.TensorDataset(inputs, labels)
loader = gk.GEKOLoader(dataset, batch_size=50, num_epochs=10)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - loader.progress)
for number, epoch in enumerate(loader.epochs(), 1):
    trained = 0
    for batch in epoch:  # the planned ones, and looks at what was left out (`trains` False)
        model.train(batch.trains)
        with torch.set_grad_enabled(batch.trains):
            x, y = batch.data
            loss = gk.weighted_loss(model(x), y, batch.ids, loader.state, sample_weights=batch.weights, update=True)
        if batch.trains:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            trained += len(batch.ids)
    buckets = loader.state.bucket_counts().tolist()
    counts = {bucket.name: count for bucket, count in zip(gk.Bucket, buckets, strict=True)}
    print(f"epoch {number}: trained on {trained} samples, now {counts}")

accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"accuracy on the training set: {accuracy:.3f}")
