"""The authors' measure of how similar two queries are: sentence embeddings."""

import torch


class SentenceSimilarity:
    """Cosine of two sentence embeddings. An embedding is the mean of the last hidden states over
    the tokens, as all-MiniLM-L6-v2 makes it.

    folder: an encoder in transformers' format, such as sentence-transformers/all-MiniLM-L6-v2 (the
    paper's). It runs on the CPU.
    """

    def __init__(self, folder: str):
        from transformers import AutoModel, AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def embed(self, text: str) -> torch.Tensor:
        """[D], of length 1. It is computed once for each text."""
        if text not in self.known:
            inputs = self.tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            hidden = self.model(**inputs).last_hidden_state[0]          # one text: no padding
            self.known[text] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        return self.known[text]

    def __call__(self, query: str, gold: str) -> float:
        return float(self.embed(query) @ self.embed(gold))
