//! The structures of rdma-sys against the headers that the library was built with: the compiler says where their fields lie.

use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::process::Command;

use rdma_sys::*;

macro_rules! fields {
    ($list:ident, $($structure:ident { $($field:ident $(as $c:literal)?),* $(,)? })+) => {
        $(
            $list.push((format!("sizeof(struct {})", stringify!($structure)), size_of::<$structure>()));
            $(
                #[allow(unused_mut, unused_assignments)]
                {
                    let mut name = stringify!($field).trim_start_matches("r#").to_string();
                    $( name = $c.to_string(); )?
                    let expression = format!("offsetof(struct {}, {name})", stringify!($structure));
                    $list.push((expression, offset_of!($structure, $field)));
                }
            )*
        )+
    };
}

#[test]
fn structures_lie_where_the_c_compiler_puts_them() {
    let mut expected: Vec<(String, usize)> = Vec::new();
    fields! { expected,
        ibv_send_wr {
            wr_id, next, sg_list, num_sge, opcode, send_flags,
            imm_data_invalidated_rkey_union as "imm_data", wr, qp_type, bind_mw_tso_union as "bind_mw",
        }
        ibv_recv_wr { wr_id, next, sg_list, num_sge }
        ibv_sge { addr, length, lkey }
        ibv_wc {
            wr_id, status, opcode, vendor_err, byte_len, imm_data_invalidated_rkey_union as "imm_data", qp_num, src_qp,
            wc_flags, pkey_index, slid, sl, dlid_path_bits,
        }
        ibv_qp_init_attr { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        ibv_qp_cap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
        ibv_qp_attr {
            qp_state, path_mtu, qp_access_flags, cap, ah_attr, alt_ah_attr, max_rd_atomic, max_dest_rd_atomic,
            min_rnr_timer, timeout, retry_cnt, rnr_retry, rate_limit,
        }
        ibv_ah_attr { grh, dlid, is_global, port_num }
        ibv_global_route { dgid, flow_label, sgid_index, hop_limit, traffic_class }
        ibv_device_attr { max_qp_wr, max_cqe, max_qp_rd_atom, max_qp_init_rd_atom, atomic_cap, phys_port_cnt }
        ibv_port_attr { state, max_mtu, active_mtu, max_msg_sz, link_layer }
        ibv_mr { context, pd, addr, length, handle, lkey, rkey }
        ibv_qp { context, handle, qp_num, state }
        ibv_context { device, ops, cmd_fd, async_fd }
        ibv_comp_channel { context, fd }
        ibv_async_event { element, event_type }
        rdma_cm_id { verbs, channel, context, qp, route, ps, port_num }
        rdma_cm_event { id, listen_id, event, status, param }
        rdma_conn_param {
            private_data, private_data_len, responder_resources, initiator_depth, flow_control, retry_count,
            rnr_retry_count, srq, qp_num,
        }
        rdma_event_channel { fd }
    }
    expected.push((
        "offsetof(struct ibv_send_wr, wr.rdma.rkey)".into(),
        offset_of!(ibv_send_wr, wr) + offset_of!(rdma_t, rkey),
    ));
    for (field, offset) in [
        ("remote_addr", offset_of!(atomic_t, remote_addr)),
        ("compare_add", offset_of!(atomic_t, compare_add)),
        ("swap", offset_of!(atomic_t, swap)),
        ("rkey", offset_of!(atomic_t, rkey)),
    ] {
        let expression = format!("offsetof(struct ibv_send_wr, wr.atomic.{field})");
        expected.push((expression, offset_of!(ibv_send_wr, wr) + offset));
    }
    let mut source = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\nint main(void) {\n",
    );
    for (expression, _) in &expected {
        writeln!(source, "    printf(\"%zu\\n\", (size_t)({expression}));").unwrap();
    }
    source.push_str("    return 0;\n}\n");
    let directory = tempfile::tempdir().unwrap();
    let (file, program) = (directory.path().join("layout.c"), directory.path().join("layout"));
    std::fs::write(&file, source).unwrap();
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(&file).status().unwrap();
    assert!(compiled.success(), "the C compiler does not take the comparison");
    let output = Command::new(&program).output().unwrap();
    let numbers: Vec<usize> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers.len(), expected.len());
    for ((expression, here), there) in expected.iter().zip(numbers) {
        assert_eq!(*here, there, "{expression}");
    }
}
