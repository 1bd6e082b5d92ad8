"""The zarr-python view: a reference set, which fsspec opens as a file system.

The JSON form is version 1 of fsspec.github.io/kerchunk/spec.html: each key of a Zarr hierarchy is
text, or [file, offset, length]. The folder of the packs is the template ``u``, so that a copy of
the checkpoint that lies elsewhere needs only ``template_overrides``. Types that zarr-python does
not know are shown as unsigned integers of the same bits; ``everstep_dtype`` says what they are.

A reference set names every chunk in text, some 100 bytes each, so that one for thousands of tensors
on many ranks is large: it is made when somebody asks for it.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.views.zarr_metadata import CORE_TYPES, encode_metadata, group_metadata
from everstep.checkpoint.views.zarr_nodes import ArrayNode, zarr_nodes


def write_references(manifest: Manifest, packs: str, path: Path) -> None:
    """Write the reference set of a checkpoint to a new file; on any error it is gone again.

    Args:
        manifest: the checkpoint.
        packs: where its packs are: an absolute path or a URL, without trailing slash.
        path: the file to create.

    Raises:
        FileExistsError: the file exists already.
        OSError: as the file system reports it.
    """
    with path.open("x", encoding="ascii") as out:
        try:
            out.writelines(reference_text(manifest, packs))
        except BaseException:
            path.unlink()
            raise


def reference_text(manifest: Manifest, packs: str) -> Iterator[str]:
    """The JSON text of a reference set, in pieces; arguments as for ``write_references``."""
    yield f'{{"version":1,"templates":{{"u":{json.dumps(packs)}}},"refs":{{\n'
    files = [json.dumps("{{u}}/" + record.file) for record in manifest.packs]
    consolidated, root = {}, {}
    for node in zarr_nodes(manifest, CORE_TYPES):
        if not node.path:
            root = dict(node.metadata["attributes"])
            continue
        consolidated[node.path] = node.metadata
        path = json.dumps(node.path)[1:-1]
        yield f'"{path}/zarr.json":{_as_text(encode_metadata(node.metadata))},\n'
        if isinstance(node, ArrayNode):
            chunks = product(*(map(str, range(n)) for n in node.counts))
            places = zip(node.packs.tolist(), node.offsets.tolist(), strict=True)
            yield from (
                f'"{path}/{"/".join(("c", *index))}":[{files[pack]},{offset},{node.chunk_bytes}],\n'
                for index, (pack, offset) in zip(chunks, places, strict=True)
            )
    whole = encode_metadata(group_metadata(root, consolidated))
    yield f'"zarr.json":{_as_text(whole)}}}}}\n'


def _as_text(data: bytes) -> str:
    """A value that the reference set holds itself."""
    return json.dumps(data.decode())
