from synthia_vllm.cli import main

main()
