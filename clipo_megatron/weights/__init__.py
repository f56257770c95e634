"""Weights between Hugging Face folders and Megatron models, through one declared mapping a family.

    spec      facts of an architecture, from config.json     mapping   kinds of correspondence, rules, entries
    families  the rules, one module a family                 reader    tensors of a folder, lazily
    coverage  one to one or an error                         load      folder -> one rank's parameters
    export    all ranks' parameters -> full tensors, live

Example, filling the model chunk of one pipeline stage:

    spec = model_spec(read_config(folder))
    stage = even_stages(spec.num_layers, pp_size)[pp_rank]
    with HFReader(folder) as reader:
        check_tensors(reader, spec)
        at = Coordinates(tp=tp_size, tp_rank=tp_rank)
        load_into(model.named_parameters(), entries(spec, stage, at), reader, at)
"""
