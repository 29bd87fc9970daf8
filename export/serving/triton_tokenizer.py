"""Tokenise texts (rows, 1) or pairs (rows, 2): a model of Triton's Python backend, which deploy-prune wrote."""

import json
import os
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

FEATURES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TritonPythonModel:
    """Turn TEXT into the token ids that the model behind it takes."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.names = [output["name"] for output in json.loads(args["model_config"])["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
        try:
            rows = [tuple(text.decode("utf-8") for text in row) for row in texts.reshape(len(texts), -1)]
        except UnicodeDecodeError:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("TEXT is not UTF-8."))
        if any(len(row) > 2 for row in rows):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("A row of TEXT has one text, or two."))
        encodings = self.tokenizer.encode_batch([row if len(row) == 2 else row[0] for row in rows])
        tensors = []
        for name in self.names:
            array = np.array([getattr(encoding, FEATURES[name]) for encoding in encodings], dtype=np.int64)
            tensors.append(pb_utils.Tensor(name, array))
        return pb_utils.InferenceResponse(output_tensors=tensors)
