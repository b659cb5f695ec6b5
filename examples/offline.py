"""Generates in this process, without a server: `python examples/offline.py`."""

from synthia_vllm import Synthia

if __name__ == "__main__":  # vLLM spawns its workers, which read this file again
    synthia = Synthia("demo")  # a folder or a hub id of Synthia's weights where there is a GPU
    question = [{"role": "user", "content": "What is an orca?"}]
    print(synthia.chat(question, max_tokens=32))
    for answer in synthia.chat([question, question], system="tot", max_tokens=32):  # both at once
        print(answer)
