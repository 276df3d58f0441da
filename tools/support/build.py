import argparse, os, sys, time, traceback, warnings, resource
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES
from nnsight.anatomy.tiny import tiny_model
from nnsight.anatomy.tiny_inputs import tiny_ids
from defaults import default_config, complete
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")
def main():
    kinds = sys.argv[1:] or list(TYPES)
    ok = 0
    for kind in kinds:
        t = time.time(); filled=[]
        try:
            config = default_config(kind)
            for _ in range(5):
                try:
                    model = tiny_model(config)
                    ids, inputs = tiny_ids(model)
                    with torch.no_grad():
                        model(ids, **inputs)
                    break
                except Exception as e:
                    more = complete(config, e)
                    if not more: raise
                    filled += more
            model = tiny_model(config)
            t1 = time.time()
            ids, inputs = tiny_ids(model)
            with torch.no_grad():
                out = model(ids, **inputs)
            n = sum(p.numel() for p in model.parameters())
            ok += 1
            fin = bool(torch.isfinite(out.logits).all()) if hasattr(out,'logits') else 'nologits'
            print(f"OK {kind} {t1-t:.2f}s {time.time()-t1:.2f}s {n/1e6:.2f}M {'' if n<2e6 else 'BIG'} {tuple(out.logits.shape) if hasattr(out,'logits') else type(out).__name__} {filled or ''} {'' if fin is True else 'NONFINITE'}", flush=True)
        except Exception as e:
            tb = traceback.extract_tb(e.__traceback__)[-1]
            where = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if 'models/' in f.filename][-2:]
            print(f"FAIL {kind} {type(e).__name__} {' '.join(str(e).split())[:260]} @ {where} {os.path.basename(tb.filename)}:{tb.lineno}", flush=True)
    print(ok, "of", len(kinds))
main()
