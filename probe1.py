import os, sys, torch, torch.distributed as dist, warnings
import multiprocessing as mp
from pathlib import Path
def work(rank, n, store):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK":str(rank),"WORLD_SIZE":str(n),"MASTER_ADDR":"127.0.0.1","MASTER_PORT":str(store)}
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    from finpatch.patchtst import PatchTST, PatchTSTConfig
    from finpatch.trainer import make_optimizer
    from finpatch.experiment import OptimConfig
    torch.manual_seed(0)
    m = PatchTST(PatchTSTConfig(n_features=3, context_length=20, d_model=16, n_heads=2, n_layers=2, d_ff=32, dropout=0.0)).double()
    mesh = init_device_mesh("cpu", (n,))
    for b in m.encoder: fully_shard(b, mesh=mesh)
    fully_shard(m, mesh=mesh)
    m.set_gradient_divide_factor(1.0)
    opt = make_optimizer(m, OptimConfig(lr=1e-3))
    x = torch.randn(8,20,3,dtype=torch.float64)
    for i in range(3):
        m.train(); opt.zero_grad()
        y = m(x[rank::n]); (y**2).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
        full = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(list(m.parameters()), 0.1, full)
        opt.step()
        m.eval()
        with torch.no_grad(): m(x)
    sd = m.state_dict()
    if rank==0: print(type(norm), full, type(sd["head.bias"]), {k:(v.to_local().shape if hasattr(v,'to_local') else v.shape) for k,v in list(sd.items())[-3:]})
    st = opt.state_dict()["state"]
    flat = {f"model.{k}":v for k,v in sd.items()} | {f"optimizer.{i}.{k}":v for i,s in st.items() for k,v in s.items()}
    flat |= {"epoch_loss": torch.tensor(3.5), f"rng.{rank}": torch.get_rng_state()}
    flat["lr"]=torch.tensor([1e-3,1e-3],dtype=torch.float64)
    import torch.distributed.checkpoint as dcp
    try:
        dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter("/tmp/d9x/ck%d"%n, save_distributed=True))
    except Exception as e:
        print("save", type(e), str(e)[-800:])
    dist.barrier()
    if rank==0:
        for f in sorted(Path("/tmp/d9x/ck%d"%n).glob("*")): print(f, f.stat().st_size)
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    for src in (2,4):
        if not Path("/tmp/d9x/ck%d"%src).exists(): continue
        r = HuggingFaceStorageReader("/tmp/d9x/ck%d"%src)
        md = r.read_metadata()
        t = {k: torch.zeros_like(v) for k,v in flat.items() if not k.startswith("rng")}
        try:
            dcp.load(t, storage_reader=HuggingFaceStorageReader("/tmp/d9x/ck%d"%src))
            bad = [k for k in t if k not in("epoch_loss",) and not torch.allclose((t[k].full_tensor() if hasattr(t[k],'full_tensor') else t[k]), (flat[k].full_tensor() if hasattr(flat[k],'full_tensor') else flat[k]))]
            print(rank, src, "bad", bad[:5], t["epoch_loss"])
        except Exception as e: print("load", src, type(e), str(e)[-1500:])
    dist.destroy_process_group()
if __name__=="__main__":
    import socket
    for n in (2,4):
        s=socket.socket(); s.bind(("127.0.0.1",0)); port=s.getsockname()[1]; s.close()
        ps=[mp.get_context("fork").Process(target=work,args=(r,n,port)) for r in range(n)]
        [p.start() for p in ps]; [p.join() for p in ps]
        print([p.exitcode for p in ps])
