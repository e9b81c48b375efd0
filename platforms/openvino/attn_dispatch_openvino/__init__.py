"""OpenVINO's native paged attention behind the contract of attn_dispatch: the backend `openvino/paged`."""
