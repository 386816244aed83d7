"""What the backend takes from TensorRT, for ``test_api_lint``.

    source == API    the backend's syntax tree is compared with the table, so
                     neither can gain or lose an attribute alone
    API in wheels    the names in the real binding wheels, kept in ``tensorrt_api.json``
                     and proved against them, hold each one

For the first check to see through the code, a TensorRT object is only ever held
in a variable (or attribute) whose name is in ``HANDLES``, and those names hold
nothing else that is looked into.
"""

from __future__ import annotations

from collections.abc import Mapping

# class -> attribute -> the class that the attribute is, or returns ("" for plain values).
# "" is the module itself.
API: Mapping[str, Mapping[str, str]] = {
    "": {
        "__version__": "",
        "Builder": "Builder",
        "BuilderFlag": "BuilderFlag",
        "ComputeCapability": "ComputeCapability",
        "HardwareCompatibilityLevel": "HardwareCompatibilityLevel",
        "ILogger": "ILogger",
        "IProgressMonitor": "IProgressMonitor",
        "IStreamWriter": "IStreamWriter",
        "MemoryPoolType": "MemoryPoolType",
        "NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
        "OnnxParser": "OnnxParser",
        "OnnxParserRefitter": "OnnxParserRefitter",
        "Refitter": "Refitter",
        "Runtime": "Runtime",
        "SerializationFlag": "SerializationFlag",
        "TensorIOMode": "TensorIOMode",
    },
    "Builder": {
        "build_serialized_network_to_stream": "",
        "create_builder_config": "IBuilderConfig",
        "create_network": "INetworkDefinition",
        "create_optimization_profile": "IOptimizationProfile",
    },
    "BuilderFlag": {"REFIT_INDIVIDUAL": "", "STRIP_PLAN": "", "TF32": "", "VERSION_COMPATIBLE": ""},
    "ComputeCapability": {"__members__": ""},
    "DataType": {"name": ""},
    "HardwareCompatibilityLevel": {"AMPERE_PLUS": "", "SAME_COMPUTE_CAPABILITY": ""},
    "IBuilderConfig": {
        "add_optimization_profile": "",
        "builder_optimization_level": "",
        "clear_flag": "",
        "create_timing_cache": "ITimingCache",
        "get_flag": "",
        "get_memory_pool_limit": "",
        "get_timing_cache": "ITimingCache",
        "hardware_compatibility_level": "",
        "num_compute_capabilities": "",
        "progress_monitor": "",
        "set_compute_capability": "",
        "set_flag": "",
        "set_memory_pool_limit": "",
        "set_timing_cache": "",
    },
    "ICudaEngine": {
        "create_execution_context": "IExecutionContext",
        "create_serialization_config": "ISerializationConfig",
        "get_tensor_dtype": "DataType",
        "get_tensor_mode": "",
        "get_tensor_name": "",
        "num_io_tensors": "",
        "num_optimization_profiles": "",
        "serialize_with_config": "",
    },
    "IExecutionContext": {
        "execute_async_v3": "",
        "get_tensor_shape": "",
        "set_input_shape": "",
        "set_optimization_profile_async": "",
        "set_tensor_address": "",
    },
    "ILayer": {"get_output": "ITensor", "num_outputs": ""},
    "ILogger": {
        "ERROR": "",
        "INFO": "",
        "INTERNAL_ERROR": "",
        "VERBOSE": "",
        "WARNING": "",
        "log": "",
    },
    "INetworkDefinition": {
        "get_input": "ITensor",
        "get_layer": "ILayer",
        "get_output": "ITensor",
        "mark_weights_refittable": "",
        "name": "",
        "num_inputs": "",
        "num_layers": "",
        "num_outputs": "",
    },
    "IOptimizationProfile": {"set_shape": ""},
    "IProgressMonitor": {"phase_finish": "", "phase_start": "", "step_complete": ""},
    "ISerializationConfig": {"clear_flag": "", "set_flag": ""},
    "IStreamWriter": {"write": ""},
    "ITensor": {"dtype": "DataType", "name": "", "shape": ""},
    "ITimingCache": {"combine": "", "serialize": ""},
    "MemoryPoolType": {"WORKSPACE": ""},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": ""},
    "OnnxParser": {
        "get_error": "ParserError",
        "num_errors": "",
        "parse_from_file": "",
    },
    "OnnxParserRefitter": {"refit_from_file": ""},
    "ParserError": {"desc": "", "local_function_stack": "", "node_name": "", "node_operator": ""},
    "Refitter": {
        "get_all_weights": "",
        "get_missing_weights": "",
        "refit_cuda_engine": "",
    },
    "Runtime": {"deserialize_cuda_engine": "ICudaEngine"},
    "SerializationFlag": {"EXCLUDE_WEIGHTS": "", "INCLUDE_REFIT": ""},
    "TensorIOMode": {"INPUT": ""},
}

# "Class.attribute" that not every supported version has -> the one whose ``hasattr``
# decides, in the backend, whether it is used.
OPTIONAL: Mapping[str, str] = {
    ".ComputeCapability": ".ComputeCapability",
    "ComputeCapability.__members__": ".ComputeCapability",
    "IBuilderConfig.num_compute_capabilities": ".ComputeCapability",
    "IBuilderConfig.set_compute_capability": ".ComputeCapability",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "SerializationFlag.INCLUDE_REFIT": "SerializationFlag.INCLUDE_REFIT",
}

# variable or attribute name -> the class of what it holds.
HANDLES: Mapping[str, str] = {
    "trt": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "data_type": "DataType",
    "engine": "ICudaEngine",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "optimization_profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "parser_refitter": "OnnxParserRefitter",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "serialization": "ISerializationConfig",
    "timings": "ITimingCache",
    "trt_tensor": "ITensor",
}
