"""Embeddings with token states by the code of the embed step, without Ray."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch

from models.clip_config import ClipDims
from models.text import TextEncoding
from pipeline.data.embed import Embedder
from pipeline.data.token_states import EmptyCaption, pack, states_file, states_schema, to_rows, write_states
from pipeline.networks.clip import clip_folder
from pipeline.recipe.sections import EmbedConfig
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact


def add_states(embed: Artifact) -> None:
    """Add made-up token states to embeddings that no CLIP has made: two tokens a row."""
    dims = ClipDims(embed_dim=4, text_width=4, context_length=8)
    null = TextEncoding(torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.ones(1, 2).bool(), torch.zeros(1, 2).long())
    schema = states_schema(EmptyCaption(dims, null))
    for shard, record in embed.shard_records().items():
        uids = pq.read_table(embed.path(f"{shard}.parquet"))["uid"].combine_chunks()
        packed = pack(null[torch.zeros(len(uids)).long()], dims.context_length)
        name = states_file(shard)
        with embed.write(name) as path, write_states(path, schema) as writer:
            writer.write_batch(to_rows(uids, packed, schema))
        embed.commit_shard(replace(record, files=record.files | {name: embed.describe(name)}))


def embed_with_states(folder: Path, download: Artifact, clip: Artifact) -> Artifact:
    """Embed every shard in batches of three rows."""
    output = Artifact(str(folder))
    embedder = Embedder(clip_folder(clip), EmbedConfig(batch_size=3, token_states=True))
    for shard in download.shard_records():
        tar, parquet = (download.path(f"{shard}.{suffix}") for suffix in ("tar", "parquet"))
        result, names = embedder.write(tar, parquet, shard, output)
        files = {name: output.describe(name) for name in names}
        output.commit_shard(ShardRecord(shard=shard, counts=dict(result.counts), files=files, splits=result.splits))
    return output
