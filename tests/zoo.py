"""Plain torch models of the usual kinds, small: a CNN, recurrent ones, a graph network, transformers of torch's own.

`ZOO` has, for each: the model, its inputs, and the path of a module that is called once, with a tensor or a tuple.
"""

import torch
import torch.nn.functional as F
from torch import nn

import toys


class CNN(nn.Module):
    """[row, 3, 8, 8] -> [row, 5]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.conv1(x))))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    """Ids [row, token] -> [row, 3], through an nn.LSTM of two layers and both directions."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 6, 2, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        x, _ = self.rnn(self.embed(ids))
        return self.head(x.mean(1 if self.rnn.batch_first else 0))


class Packed(nn.Module):
    """Ids [row, token] and their lengths -> [row, 3], and the states [row, token, 6]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.rnn(packed)
        return self.head(last[-1]), nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]


class Cells(nn.Module):
    """Ids [row, token] -> [row, 3], through cells that the model calls itself, token by token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.cell = nn.GRUCell(8, 6)
        self.upper = nn.LSTMCell(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        hidden, state = torch.zeros(len(ids), 6), None
        for token in ids.unbind(1):
            hidden = self.cell(self.embed(token), hidden)
            state = self.upper(hidden, state)
        return self.head(state[0])


class Graph(nn.Module):
    """Nodes [node, 4], edges [2, edge], the graph of each node [node] -> [graph, 2], by two rounds of messages."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.message = nn.Linear(16, 8)
        self.update = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, nodes, edges, graph):
        hidden, (source, target) = self.embed(nodes), edges
        for _ in range(2):
            sent = self.message(torch.cat([hidden[source], hidden[target]], -1))
            received = torch.zeros_like(hidden).index_add(0, target, sent)
            hidden = F.relu(self.update(hidden + received))
        return self.head(torch.zeros(2, 8).index_add(0, graph, hidden))


class ViT(nn.Module):
    """[row, 3, 8, 8] -> [row, 5], with nn.TransformerEncoderLayers, and a class token."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.place = nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks = nn.ModuleList(encoder_layer(norm_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LENGTHS = torch.tensor([5, 3])
GRAPH = (
    random(6, 4),
    torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]]),
    torch.tensor([0, 0, 0, 1, 1, 1]),
)
ZOO = {
    "cnn": (CNN, (random(2, 3, 8, 8),), "conv2"),
    "lstm": (Recurrent, (IDS,), "rnn"),
    "packed": (Packed, (IDS, LENGTHS), "head"),
    "cells": (Cells, (IDS,), "head"),
    "graph": (Graph, GRAPH, "head"),
    "vit": (ViT, (random(2, 3, 8, 8),), "blocks.1"),
    "inside a vit": (ViT, (random(2, 3, 8, 8),), "blocks.0.linear1"),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True),
        (random(2, 5, 8), random(2, 3, 8)),
        "decoder.layers.0",
    ),
    "attention": (lambda: nn.Sequential(nn.Identity(), Twice()), (random(2, 5, 8),), "1.attn"),
}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        hidden, pattern = self.attn(x, x, x)
        return hidden + pattern.amax((1, 2))[:, None, None] * x


def build(name):
    kind, inputs, path = ZOO[name]
    return toys.seeded(kind()).eval(), inputs, path
