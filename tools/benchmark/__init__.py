"""What tools/bench.py is made of.

session    starts one worker process per configuration and interleaves their rounds
worker     that process: loads a subject and measures it, one command at a time
autosteer_subject, one_graph, genai_subject, llama_cpp_subject, torch_subject     what a worker measures
weights    bits and block sizes, read back from the files that are run
peers      the same weights for other runtimes
machine    the processor and its read bandwidth
report     medians, ratios, tables
"""
