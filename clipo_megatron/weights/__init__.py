"""The weights of a model between Hugging Face folders and Megatron, by one declared mapping for each family.

    spec      the facts of an architecture, from config.json
    families  what is known of each family: its facts, its mapping rules, its layout in rollout servers
    mapping   rules, and the entries that bind them to a model chunk      sharding  how parameters are divided
    coverage  the check that parameters and tensors match one to one
    load      from a folder into one rank's parameters                    export    from all ranks to full tensors, live
    formats/  safetensors and torch_dist, read in pieces

Example, filling the model chunk of one pipeline stage:

    spec = model_spec(read_config(folder))
    stage = even_stages(spec.num_layers, pp_size)[pp_rank]
    with HFReader(folder) as reader:
        check_tensors(reader, spec)
        at = Coordinates(tp=tp_size, tp_rank=tp_rank)
        load_into(model.named_parameters(), entries(spec, stage, at), reader, at)
"""
